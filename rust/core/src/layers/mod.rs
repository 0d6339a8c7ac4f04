//! The modules of a transformer: forward beside backward, one file each.
