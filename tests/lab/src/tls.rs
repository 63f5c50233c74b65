//! mTLS over sockets with descriptor passing, both roles, strict.
