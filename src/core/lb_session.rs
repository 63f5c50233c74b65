//! The life of one load-balancer connection.
