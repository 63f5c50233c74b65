//! Network namespaces without names.
