"""Methods: model, data -> model, where there is no loss to step on. One file a method."""
