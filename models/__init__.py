"""What a policy is: a decoder that takes groups as rows, its loading, its adapters, its attention."""
