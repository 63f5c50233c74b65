//! Facts about the outside world, and the kernel state that follows from them.
