//! What is computed: its arrays.

pub mod rows;
