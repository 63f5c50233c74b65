//! What the daemon asks of the network service manager (nsmgr): LBs are found
//! through its registry, connected through its Request, watched through its
//! monitor.

pub mod caller;
