//! The forwarder's data plane: veth pairs.
