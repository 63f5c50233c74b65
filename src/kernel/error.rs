//! Kernel errors.

/// Why the kernel side could not be started.
#[derive(Debug)]
pub struct KernelError(pub String);
