"""Model families: each file maps one family's configuration onto the shared decoder; ``registry`` lists them."""
