"""From measurements to a plan: the budget, the candidates of each layer, their price, the choice among them."""
