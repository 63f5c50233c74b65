//! Delay schedules.
