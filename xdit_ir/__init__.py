"""xdit-ir: port a diffusion transformer to several GPUs with one trace call."""
