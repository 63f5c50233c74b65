//! Path segments as nsmgr, forwarder and endpoints update them.
