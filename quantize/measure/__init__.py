"""What is measured: inputs, gradients, sensitivities and errors of a model's matrices, in one pass over text."""
