//! When to register, refresh and unregister the endpoint.
