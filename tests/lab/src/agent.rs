//! The SPIRE agent: the Workload API with rotation on command.
