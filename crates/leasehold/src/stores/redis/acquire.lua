-- KEYS: the locks of all claims, then their fences, then their tombstones. ARGV: owner, record, ttl ms and wish of each
-- claim; a wish is empty (no waiting, one token), or how many tokens, or that and how to wait: process, ms that it counts
-- as alive, attempt, longest line.
-- Answers for each (alone: without a list): the token of a new grant, or {value, remaining ms} of what is there already,
-- and if it waits in line, {value, remaining ms, how many are ahead}; or an error.
local call, pcall, sub = redis.call, redis.pcall, string.sub
local count = #KEYS / 3
local time = call('TIME')
local now, now_text = time[1] * 1000000 + time[2], time[1] .. string.sub('00000' .. time[2], -6)
local hour = now - now % 3600000000

-- The lock was never granted as far as is known, or it has a line: those in line come first.
local function in_turn(lock, fence, last, owner, record, ttl, wish)
  local it = line()
  local last, strange = it.last(fence)
  if strange then return redis.error_reply('BADFENCE token') end
  local queue = it.keys(fence)
  if call('EXISTS', queue) == 0 then return nil, last, ':' end
  if call('EXISTS', lock) == 0 then
    local claim = sub(owner, 5, 36)
    if string.find(wish, ' ', 1, true) then
      local rank = it.enqueue(lock, nil, fence, claim, wish, ttl, record)
      if type(rank) == 'table' then return rank end
    end
    -- Nobody there, not even the asker, if a great many before it keep silent: then it need not stand in line.
    if not it.hand_over(lock, fence, claim) then it.leave(fence, claim) end
    last = it.last(fence)
  end
  return nil, last, call('EXISTS', queue) == 1 and '!' or ':'
end

local function busy(lock, fence, owner, record, ttl, wish)
  local value = pcall('GET', lock)
  if type(value) ~= 'string' then return redis.error_reply('WRONGTYPE lock') end
  local answer = {sub(value, 1, 4300), call('PTTL', lock)}
  if sub(value, 1, 36) ~= sub(owner, 1, 36) and string.find(wish, ' ', 1, true) then
    local rank = line().enqueue(lock, value, fence, sub(owner, 5, 36), wish, ttl, record)
    if type(rank) == 'table' then return rank end
    answer[3] = rank
  end
  return answer
end

local function take(lock, fence, last, gone, owner, record, ttl, wish)
  if gone then return redis.error_reply('WITHDRAWN claim') end
  local token, text, tag = now, now_text, ':'
  local number = type(last) == 'string' and tonumber(last)
  if not number then
    local error
    error, number, tag = in_turn(lock, fence, last, owner, record, ttl, wish)
    if error then return error end
  end
  if number and not (number < now) then
    token = number + 1
    text = string.format('%.0f', token)
  end
  local stored, kept_text = token, text
  if wish ~= '' and sub(wish, 1, 2) ~= '1 ' then
    stored = token + tonumber(string.match(wish, '^%d+')) - 1
    kept_text = string.format('%.0f', stored)
  end
  if not (stored <= 9007199254740991 and token % 1 == 0) then return redis.error_reply('BADFENCE token') end
  if tag == '!' then owner, kept_text = sub(owner, 1, 36) .. '!', kept_text .. '!' end
  local set = pcall('SET', lock, owner .. text .. ':' .. record, 'NX', 'PX', ttl)
  if not set then return busy(lock, fence, owner, record, ttl, wish) end
  if set.err then return set end
  if number and number - number % 3600000000 == hour and #ttl <= 7 then
    -- 25 hours, renewed by the first grant of each hour, are 24 at least; keeping what is set is cheaper.
    set = pcall('SET', fence, kept_text, 'KEEPTTL')
  else
    local kept = '90000000'
    if #ttl > 7 and ttl * 2 > 90000000 then kept = string.format('%.0f', ttl * 2) end
    -- A token that is ahead of the clock is kept until the clock has caught up.
    if stored > now then kept = string.format('%.0f', kept + (stored - now) / 1000) end
    if number then
      set = pcall('SET', fence, kept_text, 'PX', kept)
    else
      -- A key of another type may be shown as none, and NX will not overwrite it.
      set = pcall('SET', fence, kept_text, 'NX', 'PX', kept)
    end
  end
  if not set or set.err then
    call('DEL', lock)
    return set or redis.error_reply('BADFENCE token')
  end
  return token
end

if count == 1 then
  -- For one claim GET is cheaper than MGET. Its error says that the key is of another type, or that a right is lacking.
  local last, gone = pcall('GET', KEYS[2]), call('EXISTS', KEYS[3]) == 1
  if type(last) == 'table' and string.sub(last.err, 1, 9) ~= 'WRONGTYPE' then return last end
  return take(KEYS[1], KEYS[2], last, gone, ARGV[1], ARGV[2], ARGV[3], ARGV[4])
end
local seen, answers = call('MGET', unpack(KEYS, count + 1)), {}
for i = 1, count do
  answers[i] = take(KEYS[i], KEYS[count + i], seen[i], seen[count + i], unpack(ARGV, 4 * i - 3, 4 * i))
end
return answers
