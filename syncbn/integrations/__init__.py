"""Other frameworks: one module for each, which imports that framework. Nothing else of the package imports these."""
