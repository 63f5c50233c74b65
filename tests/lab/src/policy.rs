//! nsmgr's authorisation policies.
