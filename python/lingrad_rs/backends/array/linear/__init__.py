"""What the low-rank engines share: features, passes over tokens, scans under a causal mask."""
