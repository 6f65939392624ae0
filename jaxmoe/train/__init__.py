"""Next-token training: data, loss, optimizer, and the loop around them."""
