//! Which load balancers exist.
