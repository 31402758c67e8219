-- KEYS: locks, then the index (none in a cluster). ARGV: length of the prefix, then owner (with its token, if known) and ttl ms (0: only
-- confirm) of each lock.
-- Answers for each lock: remaining ms, -1 if it never ends, -2 if it is lost, or an error.
local answers, held, longest = {}, {}, 0
local count = (#ARGV - 1) / 2
for i = 1, count do
  local value, owner = redis.pcall('GET', KEYS[i]), ARGV[2 * i]
  local answer = -2
  -- The byte after the claim id only says whether there is a line.
  if type(value) == 'string' and string.sub(value, 1, 36) == string.sub(owner, 1, 36)
    and string.sub(value, 38, #owner) == string.sub(owner, 38) then
    local ttl = tonumber(ARGV[2 * i + 1])
    answer = redis.call('PTTL', KEYS[i])
    if ttl > 0 and answer < ttl then
      local done = redis.pcall('PEXPIRE', KEYS[i], ttl)
      if type(done) == 'table' and done.err then answer = done else answer = ttl end
    end
    if type(answer) == 'number' and answer > 0 then
      held[#held + 1] = answer
      held[#held + 1] = string.sub(KEYS[i], ARGV[1] + 1)
      if answer > longest then longest = answer end
    end
  end
  answers[i] = answer
end
if #held > 0 and KEYS[count + 1] then
  -- The index serves people who look; no trouble with it may cost a lock.
  local index = KEYS[count + 1]
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  for i = 1, #held, 2 do held[i] = string.format('%.0f', now + held[i]) end
  redis.pcall('ZADD', index, unpack(held))
  local ended = redis.pcall('ZRANGEBYSCORE', index, '-inf', '(' .. string.format('%.0f', now), 'LIMIT', 0, 200)
  if ended[1] then redis.pcall('ZREM', index, unpack(ended)) end
  local kept = redis.pcall('PTTL', index)
  if type(kept) == 'number' and kept < longest then
    redis.pcall('PEXPIRE', index, string.format('%.0f', longest * 2))
  end
end
return answers
