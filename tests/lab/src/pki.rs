//! Certificate authorities and SVIDs, good and bad.
