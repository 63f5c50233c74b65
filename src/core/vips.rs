//! Which VIPs are taken over from NSP, and which are refused.
