"""How members of a virtual model vote. Pure: answers in, ballots and counts out."""
