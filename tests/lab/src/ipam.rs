//! The IPAM service with the real allocation rules.
