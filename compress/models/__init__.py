"""What a model is: how its texts become tokens, how its tokens become one vector, what its files hold."""
