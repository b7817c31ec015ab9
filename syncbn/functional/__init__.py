"""Pure tensor functions: the arithmetic of every layer, differentiable, on any device."""
