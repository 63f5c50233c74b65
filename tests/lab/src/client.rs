//! The outside client and the router in front of the load balancers.
