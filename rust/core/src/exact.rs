//! The exact engine (being written).
