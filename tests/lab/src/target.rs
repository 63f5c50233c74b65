//! A target, behaving as Meridio's TAPA.
