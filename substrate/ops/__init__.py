"""What the layers compute: kernels and their choice for a device, fused elementwise parts, the scan, packed documents."""
