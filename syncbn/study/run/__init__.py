"""Running the cells of a study and recording them."""
