"""How forward transforms act inside the graph of one pass: programs per module, run by module hooks."""
