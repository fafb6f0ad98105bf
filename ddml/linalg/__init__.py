"""Dense matrices over ranks, polar factors, small factorisations."""
