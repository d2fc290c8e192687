"""The architecture of the miniature encoders: the same fields for every family."""

ARCH = {
    "hidden_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "mlp_dim": 64,
    "patch_size": 8,
    "image_size": 32,
}
