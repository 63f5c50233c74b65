//! Flows, what answered them, and what was lost.
