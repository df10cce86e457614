"""Parts of the answer cache: keys, stored answers, and requests that wait for one another."""
