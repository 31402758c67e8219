-- KEYS: the locks of all claims, then their fences, then their tombstones. ARGV: the owner of each claim, then the record
-- of each and the ttl ms of each; or, if those are the same for all, one record and one ttl.
-- Answers for each (alone: without a list): the token of a new grant, or {value, remaining ms} of what is there already, or
-- an error.
local call, pcall = redis.call, redis.pcall
local count = #KEYS / 3
local time = call('TIME')
local now, now_text = time[1] * 1000000 + time[2], time[1] .. string.sub('00000' .. time[2], -6)
local hour = now - now % 3600000000

local function take(lock, fence, last, gone, owner, record, ttl)
  if gone then return redis.error_reply('WITHDRAWN claim') end
  local token, text = now, now_text
  if last then
    last = tonumber(last)
    if not last then return redis.error_reply('BADFENCE token') end
    if not (last < now) then
      token = last + 1
      text = string.format('%.0f', token)
      if not (token <= 9007199254740991 and token % 1 == 0) then return redis.error_reply('BADFENCE token') end
    end
  end
  local set = pcall('SET', lock, owner .. text .. ':' .. record, 'NX', 'PX', ttl)
  if not set then
    local value = pcall('GET', lock)
    if type(value) == 'string' then return {string.sub(value, 1, 4300), call('PTTL', lock)} end
    return redis.error_reply('WRONGTYPE lock')
  end
  if set.err then return set end
  if last and last - last % 3600000000 == hour and #ttl <= 7 then
    -- 25 hours, renewed by the first grant of each hour, are 24 at least; keeping what is set is cheaper.
    set = pcall('SET', fence, text, 'KEEPTTL')
  else
    local kept = '90000000'
    if #ttl > 7 and ttl * 2 > 90000000 then kept = string.format('%.0f', ttl * 2) end
    -- A token that is ahead of the clock is kept until the clock has caught up.
    if token > now then kept = string.format('%.0f', kept + (token - now) / 1000) end
    if last then
      set = pcall('SET', fence, text, 'PX', kept)
    else
      -- MGET shows a key of another type as none, and NX will not overwrite it.
      set = pcall('SET', fence, text, 'NX', 'PX', kept)
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
  return take(KEYS[1], KEYS[2], last, gone, ARGV[1], ARGV[2], ARGV[3])
end
local seen, answers = call('MGET', unpack(KEYS, count + 1)), {}
local alike, record, ttl = #ARGV == count + 2, ARGV[count + 1], ARGV[count + 2]
for i = 1, count do
  if not alike then record, ttl = ARGV[count + i], ARGV[2 * count + i] end
  answers[i] = take(KEYS[i], KEYS[count + i], seen[i], seen[count + i], ARGV[i], record, ttl)
end
return answers
