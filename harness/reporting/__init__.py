"""Every table, picture and page of a set of records: the same records give the same bytes anywhere. No torch."""
