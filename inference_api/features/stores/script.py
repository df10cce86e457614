"""The one script that Redis runs for a router: it adds what was counted, and answers what all routers have counted.

Its SHA-1 is its version: two releases of the router run side by side, each its own.

KEYS, in this order: the routers; two for each window, the current and the previous one; one for each count of streams;
those of the precise limits. ARGV is read in one pass:

    instance, milliseconds after which a router is dead, id of the call ("" if it adds nothing), when requests that
        wait are not waited for any more
    number of windows, and for each: what to add to the current and to the previous one, seconds to live
    number of counts of streams, and for each: those of this router
    number of requests that wait, and for each: number of limits, and for each of them
        "w", amount, limit, milliseconds of the window, its start, seconds to live
        "s", limit, streams of this router

It answers with numbers: Unix time in milliseconds, the number of routers; for each window current and previous; for
each count of streams those of other routers; for each request 1 (taken), 0 (refused) or 2 (too late), and for each of
its limits two numbers, current and previous, or streams of this router and of others. A request takes from all of its
limits or from none.

A call whose answer was lost is sent again with its id, and adds nothing if it had been run: the router's field in the
routers is `<time of its last call>:<id>`.
"""

SCRIPT = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local me, alive, id, latest = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local ttl_of_hash = math.ceil(alive / 1000) * 2
local key, arg = 1, 4
local is_new = true
local out = {now}

local function next_key() key = key + 1 return KEYS[key] end
local function next_arg() arg = arg + 1 return ARGV[arg] end

local function add(name, text, ttl)
  if tonumber(text) == 0 or not is_new then return tonumber(redis.call('GET', name) or 0) end
  local sum = redis.call('INCRBY', name, text)
  if sum < 0 then
    -- Given back what this Redis has never counted
    redis.call('SET', name, '0')
    sum = 0
  end
  redis.call('EXPIRE', name, ttl)
  return sum
end

local own = {}
local function others(name)
  local sum, fields = 0, redis.call('HGETALL', name)
  for i = 1, #fields, 2 do
    if fields[i] ~= me then
      local count, at = string.match(fields[i + 1], '^(%d+):(%d+)$')
      if count == nil or now - tonumber(at) > alive then
        redis.call('HDEL', name, fields[i])
      else
        sum = sum + tonumber(count)
      end
    end
  end
  return sum
end
local function put(name, count)
  own[name] = count
  if count == 0 then
    redis.call('HDEL', name, me)
  else
    redis.call('HSET', name, me, count .. ':' .. now)
    redis.call('EXPIRE', name, ttl_of_hash)
  end
end

local routers, seen = 1, redis.call('HGETALL', KEYS[1])
for i = 1, #seen, 2 do
  local at, last = string.match(seen[i + 1], '^(%d+):(.*)$')
  if seen[i] == me then
    if id == '' then id = last or '' else is_new = id ~= last end
  elseif at == nil or now - tonumber(at) > alive then
    redis.call('HDEL', KEYS[1], seen[i])
  else
    routers = routers + 1
  end
end
redis.call('HSET', KEYS[1], me, now .. ':' .. id)
redis.call('EXPIRE', KEYS[1], ttl_of_hash)
out[2] = routers

for _ = 1, tonumber(next_arg()) do
  local current, previous, more, before, ttl = next_key(), next_key(), next_arg(), next_arg(), next_arg()
  out[#out + 1] = add(current, more, ttl)
  out[#out + 1] = add(previous, before, ttl)
end

for _ = 1, tonumber(next_arg()) do
  local name, count = next_key(), tonumber(next_arg())
  put(name, count)
  out[#out + 1] = others(name)
end

is_new = true
for _ = 1, tonumber(next_arg()) do
  local limits, fits = {}, now <= latest
  for i = 1, tonumber(next_arg()) do
    local one = {kind = next_arg()}
    if one.kind == 'w' then
      one.name, one.before = next_key(), next_key()
      one.text, one.limit, one.per = next_arg(), tonumber(next_arg()), tonumber(next_arg())
      one.start, one.ttl = tonumber(next_arg()), next_arg()
      one.current = tonumber(redis.call('GET', one.name) or 0)
      one.previous = tonumber(redis.call('GET', one.before) or 0)
      local left = one.per - math.min(math.max(now - one.start, 0), one.per)
      local used = one.current + math.ceil(one.previous * left / one.per)
      fits = fits and used + tonumber(one.text) <= one.limit
    else
      one.name, one.limit = next_key(), tonumber(next_arg())
      local count = tonumber(next_arg())
      if own[one.name] == nil then own[one.name] = count end
      one.previous = others(one.name)
      fits = fits and own[one.name] + one.previous < one.limit
    end
    limits[i] = one
  end
  out[#out + 1] = now > latest and 2 or (fits and 1 or 0)
  for _, one in ipairs(limits) do
    if one.kind == 'w' then
      out[#out + 1] = fits and add(one.name, one.text, one.ttl) or one.current
    else
      if fits then put(one.name, own[one.name] + 1) end
      out[#out + 1] = own[one.name]
    end
    out[#out + 1] = one.previous
  end
end
return out
"""
