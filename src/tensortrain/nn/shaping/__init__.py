"""What shapes a layer while it trains: orthogonality, regularisers, parameter groups, and stand-ins for its cores."""
