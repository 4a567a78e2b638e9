"""What every floor stands on: errors, threads for linear algebra, the heap. Knows no models and no files."""
