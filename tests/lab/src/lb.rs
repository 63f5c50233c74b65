//! A load balancer.
