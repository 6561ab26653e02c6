"""Model classes over the operators: parameters, reshapes and masks; the numbers come from the kernels."""
