//! Operations that lead from observed to wanted kernel state.
