"""Which recipe: how sensitive a model is to each choice for each of its layers, and the choices that keep a budget."""
