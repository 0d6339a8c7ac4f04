//! Criterion benches; the code is in the bench targets.
