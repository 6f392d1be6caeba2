"""`raymuon convert`: a dense model made a mixture of experts that can do at first what it could, to be trained on."""
