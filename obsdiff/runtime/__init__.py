"""Stage three: a bundle as a diffusers pipeline whose denoiser is an engine."""
