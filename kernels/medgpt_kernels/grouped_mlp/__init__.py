"""The experts of a MoE layer: one MLP per run of rows."""
