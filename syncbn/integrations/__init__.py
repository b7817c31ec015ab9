"""This package's layers in models that other libraries build. Each module needs its library: import it on demand."""
